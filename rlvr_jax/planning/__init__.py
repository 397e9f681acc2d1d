"""What a compiled program takes on a machine that is not there: memory, FLOPs, collectives, estimated time."""
