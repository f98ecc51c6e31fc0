"""Speaking with other servers. In reading order:

`addresses` (which addresses may be connected to), `outward` (one pool of TLS connections), `exchange` (one HTTP exchange over
one), `discovery` (where a server name lives), `backoff` (who can't be reached just now), `xmatrix` (signed requests, both
ways), `connections` (one signed request and its answer), `keyring` and `server_keys` (whose keys are whose), `notary` (our
keys, and others' keys for third parties), `client` (what rooms may ask), `media` (files, both ways), `queries` (what others may ask), `outbox`, `lane` and
`catch_up` (what leaves by itself). It imports `relay`; `relay` never imports it, except `relay/server.py`.
"""
