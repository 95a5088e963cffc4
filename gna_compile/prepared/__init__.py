"""What `prepare` does: annotations (`Stamp`) on modules, grids of packed latents, checks at run time."""
