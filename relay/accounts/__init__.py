"""Who may use this relay: accounts, passwords, sessions, devices and the ways in.

Reading order: users, passwords, sessions, devices, reauth, tokens, namespaces, login, register, account.
Nothing here knows an IP address or a User-Agent. Spec: client-server-api/#client-authentication.
"""
