"""Trains EAGLE-3 drafts: small models that propose several tokens a larger target then verifies at once.

The modules read in the order of the data: the first line of each says which step it is.
"""
