"""One file a host. Each imports its host when it is first used, and hides what differs between its versions."""
