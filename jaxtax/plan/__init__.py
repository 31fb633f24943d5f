"""`jaxtax plan`: compile a config's real step for a machine that is not there, and read what it takes."""
