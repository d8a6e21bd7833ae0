"""One module per program that bench.engine measures; each runs as a process of its own: Job in, PeerReport out."""
