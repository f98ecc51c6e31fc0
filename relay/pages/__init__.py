"""What a browser shows: signing in, the contact page, link pages, the public form and the moderators' desk.

Pages are made here from `templates/`; `static/` holds one style sheet and a few scripts. Nothing is built and nothing
comes from elsewhere; every page but the opening of evidence works without scripts. Read `frame.py` first.
"""
