"""What pytest does not collect: a worker that imports deepspeed, which few have."""

collect_ignore = ["zero_worker.py"]
