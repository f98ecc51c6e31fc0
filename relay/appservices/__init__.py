"""Application services: programs of the operator that act for many users, and are told what happens in their rooms.

Reading order: registration (a file), services (who they are, and whom they act for), asking (what the relay asks them),
whereabouts and transaction (what one is told), delivery (when, and until it has taken it), networks and room_lists (what
clients may look up), assembled.
Spec: application-service-api. Beside it stand the older names under which deployed services know the same things.
"""
