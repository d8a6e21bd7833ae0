"""Who is measured: two engines as programs of their own (`nemoserve`, `transformers`: Job in, PeerReport out), for
`bench.engine`; and whole servers, for `python -m bench.peers`."""
