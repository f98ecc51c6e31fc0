"""What people say about themselves and keep for themselves: profile, account data, tags, filters, and finding each other.

Reading order: profile, account_data, tags, filters, user_search. Accounts and passwords are `accounts`.
"""
