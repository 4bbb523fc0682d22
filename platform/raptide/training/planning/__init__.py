"""What a run will be, before it runs; nothing here knows the loop.

In: a recipe's settings. Out: DeepSpeed's configuration, memory, arithmetic, steps and epochs.
The way: recipe, estimate, deepspeed_config, overview, resuming, room.
"""
