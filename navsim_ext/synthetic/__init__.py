"""A made-up driving world, written in the file formats that NAVSIM users have on disk. See README.md."""
