"""The native CPU kernel."""
