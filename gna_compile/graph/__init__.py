"""Everything that knows FX: finding attention sites, resolving token layouts, rewriting."""
