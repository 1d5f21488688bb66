"""Trains EAGLE-3 drafts: small models that propose several tokens a larger target then verifies at once.

The modules read in the order of the data: config, data, vocab, target, teacher, draft, attention, loss, unroll,
trainer, checkpoint, embedded, cli.
"""
