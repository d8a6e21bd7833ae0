"""Grammars: which tokens may come next, so that a text becomes what it was asked to be. Torch-free.

    Grammar ──trial, in a process of its own──► compile, in a thread ──► kept for the next request that has the same
                                                                              │ copy
    token ──follow──► Matcher of one completion ──► masks: a bit for each token of the vocabulary ──► sampler

`language` is what a grammar may be, `trial` where it is tried, `compiler` who has those that passed, and `matcher` how
far a completion has come. llguidance compiles and matches: a lexer of regular-expression derivatives under an Earley
parser, over a trie of the vocabulary. It holds the GIL for neither.
"""
