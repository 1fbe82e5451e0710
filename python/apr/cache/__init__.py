"""The cache of a model's own calls: `apr.Cache` in generate(), and in loops of one's own."""
