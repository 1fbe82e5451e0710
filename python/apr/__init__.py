from apr import ops as ops
