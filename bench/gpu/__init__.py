"""`python -m bench.gpu`: is every GPU kernel right, and how close to the limit of this very card is the engine?"""
