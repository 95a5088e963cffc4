"""Claimed layouts, checked on the real inputs by perturbation."""
