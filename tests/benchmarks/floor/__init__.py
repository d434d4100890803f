"""The floor: Hypercorn with our barrier, guard and socket options as they stood before speed was worked on (dc9f2ca).

The modules here and in `http` are copies of the broker's own, to the letter, and stay as they are: what is gained in the
connection class must not move what it is held against.
"""
