"""What passes: receipts (stored, the latest of each), typing notices and presence (in memory only). `threads` says in which
thread an event stands, for receipts and unread counts.
"""
