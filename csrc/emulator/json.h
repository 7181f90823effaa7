// The little JSON that goes through the C interface.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace emulator {

inline std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

class JsonObject {
 public:
  JsonObject& add(const char* name, const std::string& value) { return add_raw(name, json_string(value)); }
  JsonObject& add(const char* name, int value) { return add_raw(name, std::to_string(value)); }
  JsonObject& add(const char* name, uint64_t value) { return add_raw(name, std::to_string(value)); }
  JsonObject& add_raw(const char* name, const std::string& json) {
    body_ += (body_.empty() ? "" : ",") + json_string(name) + ":" + json;
    return *this;
  }
  std::string text() const { return "{" + body_ + "}"; }

 private:
  std::string body_;
};

class JsonArray {
 public:
  JsonArray& add_raw(const std::string& json) {
    body_ += (body_.empty() ? "" : ",") + json;
    return *this;
  }
  JsonArray& add(const std::string& value) { return add_raw(json_string(value)); }
  JsonArray& add(const JsonObject& value) { return add_raw(value.text()); }
  std::string text() const { return "[" + body_ + "]"; }

 private:
  std::string body_;
};

}  // namespace emulator
