from hypothesis import settings

from tests.storages import s3_server, storage

__all__ = ["s3_server", "storage"]

# A busy machine is no reason for a law to fail.
settings.register_profile("dapo", deadline=None)
settings.load_profile("dapo")
