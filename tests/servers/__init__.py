"""Places on servers, with the real ones, each on a port of 127.0.0.1 of its own."""
