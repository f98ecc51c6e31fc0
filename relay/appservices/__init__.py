"""Application services: programs of the operator that act for many users, and are told what happens in their rooms.

Reading order: registration (a file), services (who they are, and whom they act for), asking (what the relay asks them),
transaction (what one is told), delivery (when, and until it has taken it), networks (what clients may look up).
Spec: application-service-api. Beside it stand the older names under which deployed services know the same things.
"""
