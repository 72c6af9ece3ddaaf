# The engine prepares torch before Megatron-Core is imported by anything in this package.
from mmoe.parallel import engine as engine
