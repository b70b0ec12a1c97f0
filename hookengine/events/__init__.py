"""Who answers what: the events, the plugins that answer them, and their order."""
