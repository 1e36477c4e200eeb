"""Says yes once the server answers and a kernel called wrenn has answered as well.

It is left running and idle, so that it is there in whatever starts from the template: the first
cell of a capsule waits for no interpreter. The server alone cannot tell: a kernel that nobody has
asked anything counts as starting for ever.
"""

import json
import urllib.request

from jupyter_client import BlockingKernelClient, find_connection_file

_KERNELS = "http://localhost:8888/api/kernels"


def _asked(request):
    with urllib.request.urlopen(request, timeout=40) as answer:
        return json.load(answer)


kernels = _asked(_KERNELS)
if not kernels:
    body = json.dumps({"name": "wrenn"}).encode()
    kernels = [_asked(urllib.request.Request(_KERNELS, body, {"Content-Type": "application/json"}))]
client = BlockingKernelClient(connection_file=find_connection_file(f"kernel-{kernels[0]['id']}.json"))
client.load_connection_file()
client.start_channels()
try:
    client.wait_for_ready(timeout=40)
finally:
    client.stop_channels()
