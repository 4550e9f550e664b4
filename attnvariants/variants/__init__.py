"""One file, one variant: the file's name is the variant's name, its `VARIANT` the definition."""
