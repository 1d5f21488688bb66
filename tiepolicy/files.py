"""Step 25, for adapters: the files of a checkpoint, read without trust and held against their digests."""

from tiepolicy._contents import read_index as read_index
from tiepolicy._digests import DIGESTS as DIGESTS
from tiepolicy._digests import Digest as Digest
from tiepolicy._digests import FileRecord as FileRecord
from tiepolicy._digests import Verify as Verify
from tiepolicy._digests import check_files as check_files
from tiepolicy._digests import check_recorded as check_recorded
from tiepolicy._digests import digests_text as digests_text
from tiepolicy._digests import measure as measure
from tiepolicy._digests import new_digest as new_digest
from tiepolicy._digests import read_digests as read_digests
from tiepolicy._metadata import ChunkedTensor as ChunkedTensor
from tiepolicy._metadata import Place as Place
from tiepolicy._metadata import ShardedMetadata as ShardedMetadata
from tiepolicy._metadata import read_sharded_metadata as read_sharded_metadata
from tiepolicy._paths import MANIFEST_KEY as MANIFEST_KEY
from tiepolicy._paths import member as member
from tiepolicy._paths import read_json as read_json
from tiepolicy._pickles import Record as Record
from tiepolicy._pickles import RecordUnpickler as RecordUnpickler
from tiepolicy._pickles import record as record
from tiepolicy._safetensors import Header as Header
from tiepolicy._safetensors import Stored as Stored
from tiepolicy._safetensors import header_of as header_of
from tiepolicy._safetensors import read_header as read_header
