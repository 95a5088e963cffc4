"""Models that `prepare` has seen: stamps on modules, grids of packed latents, checks at run time."""
