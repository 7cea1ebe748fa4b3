"""Files for the chat: found among the snapshots or made anew, zipped, split, checksummed, sent."""
