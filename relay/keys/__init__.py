"""End-to-end encryption as a server sees it: public keys handed out, ciphertext carried, who has to be told of changes.

In reading order: `shapes` (what keys look like), `kept` (memory in front of the tables), `published` (everybody's public
keys, here and elsewhere), `device_lists` (who hears that they changed), `remote_lists` (those of other servers),
`one_time_keys`, `cross_signing`, `device_keys` (upload and query, and the face for federation), `device_queues`,
`to_device`, `user_signatures`, `backup`.
No private key ever comes here. Spec: client-server-api/#end-to-end-encryption.
"""
