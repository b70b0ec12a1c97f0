"""What sinks receive: records, the media in them, and the thread that delivers them."""
