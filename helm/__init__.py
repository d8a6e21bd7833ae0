"""The chart `nemoserve`, and the programs that keep what is made from it current."""
