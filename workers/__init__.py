"""The processes, one file a role; each only hands over to `pkbrokers_redis.runtime.roles`."""
