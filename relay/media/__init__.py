"""Media: the bytes of attachments and avatars. `files` is the one writer and reader of them, `routes` the endpoints,
`waiting` holds readable pictures in memory until they become avatars, `remote_copies` fetches and keeps other servers' files.
"""
