"""The page at /console: static files that show what the router's JSON endpoints say."""
