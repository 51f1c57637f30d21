"""Roads to other tools and formats, one file each."""
