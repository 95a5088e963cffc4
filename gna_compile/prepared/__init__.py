"""What `prepare` does: annotations (`Annotation`) on modules, grids of packed latents, checks at run time."""
