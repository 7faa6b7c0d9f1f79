"""Secure aggregation: the server learns the weighted sum of the sites' changes, and no change of one site.

Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS 2017 (double masking, and
recovery of drop-outs from Shamir shares), over any :class:`confrere.federation.transport.Transport`. From below:

- :mod:`quantise`: changes as integers; :mod:`forms`: names and shapes apart from numbers
- :mod:`keys`, :mod:`masks`, :mod:`shamir`: standard cryptography
- :mod:`messages`: what travels
- :mod:`client`, :mod:`server`: both halves as functions of plain values
- :mod:`participant`: a site's entry; :mod:`exchange`: a round at the server; :mod:`total`: the sum it keeps

docs/secure.md says what all this protects, and what it does not.
"""
