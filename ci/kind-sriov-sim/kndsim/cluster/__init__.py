"""A real Kubernetes cluster of one or more nodes on this machine, in namespaces of its own."""

from __future__ import annotations

from kndsim.cluster.ground import Devices, Ground
from kndsim.cluster.node import Node, NotUp
from kndsim.cluster.whole import Cluster, ClusterSpec, cluster, cluster_on

__all__ = ["Cluster", "ClusterSpec", "Devices", "Ground", "Node", "NotUp", "cluster", "cluster_on"]
