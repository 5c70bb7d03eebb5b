"""The demo: pods get NICs, send known traffic, lose their agent, get it back, and give the NICs back.

Invariant: what was sent is known to a generator that looks at no counter, what is home is judged from
dumps of our own; the agent's word is only ever compared.
"""
