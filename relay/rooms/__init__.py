"""Rooms, the heart. The one folder that is divided by layer, since all of it shares the same tables.

store (tables and rows), state (what the state was where), room (one room in memory), rooms (all of them, and what other
parts may ask), append (the one function that puts an event into a room), send, create, members (what local people do),
receive, gaps and history (what other servers bring, what is fetched), timeline, relations, directory (what people read),
routes (the endpoints).
"""
