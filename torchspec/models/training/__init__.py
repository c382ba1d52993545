"""What a run needs beside the mathematics: checkpoints, resume, sharding, the recipe, numbers that are none."""
