"""One file per published method; the file's stem is the registered name."""
