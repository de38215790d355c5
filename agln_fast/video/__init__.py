"""Videos in and out: clips, cameras and addresses by PyAV (the extra `[video]`), and pictures of a sequence."""
