"""Few queries over keys in a cache, by a kernel of our own: the keys of each row are split among programs."""
