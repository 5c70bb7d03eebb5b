"""knd: a node agent that gives network devices to pods, counts their traffic and takes them back clean."""
