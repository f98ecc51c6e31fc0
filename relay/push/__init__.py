"""What people want to hear of: `rules` keeps their push rules, `unread` counts what waits for them, `pushers` and `gateway`
wake their devices.
"""
