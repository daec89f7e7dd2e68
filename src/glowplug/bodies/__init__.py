"""Op bodies: the insides of opaque ops, compiled separately."""

from glowplug.bodies.bodies import Bodies
from glowplug.bodies.body import BoundBody, InUse
from glowplug.bodies.form import CallForm, Forms, read_forms
from glowplug.bodies.group import Group

__all__ = ["Bodies", "BoundBody", "CallForm", "Forms", "Group", "InUse", "read_forms"]
