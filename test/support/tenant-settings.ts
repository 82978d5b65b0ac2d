/**
 * What can be set in the stand-in tenant, named after Auth0's dashboard, and what the README's guide sets for each kind
 * of client.
 */
import { readFileSync } from "node:fs";
import type { JSONWebKeySet } from "jose";
import type { StoredAction, StoredBinding } from "./management.ts";

export const ACTION_CODE = readFileSync(new URL("../../auth0-action.js", import.meta.url), "utf8");

/** `scopes_supported` of every Auth0 tenant. An API's permissions are never among them. */
export const OIDC_SCOPES = (
  "openid profile offline_access name given_name family_name nickname " +
  "email email_verified picture created_at identities phone address"
).split(" ");

/** Two kinds since April 2026: Settings → Advanced → DCR Security Mode. */
export const TENANT_KINDS = ["permissive", "strict"] as const;
export type TenantKind = typeof TENANT_KINDS[number];

/** Applications → APIs. */
export interface Api {
  identifier: string;
  allowOfflineAccess: boolean;
  accessTokenProfile: "auth0" | "rfc9068";
  permissions: string[];
  /** Enable RBAC, together with Add Permissions in the Access Token. */
  enableRbac: boolean;
  /** User-Delegated Access of third-party applications: left out is Unauthorized. */
  defaultPermissionsForThirdPartyApplications?: string[];
  /** Shown by the Management API, without effect here: RS256 signs every token, every application is let in. */
  signingAlgorithm?: string;
  encryptsTokens?: boolean;
  userAccessPolicy?: "allow_all" | "deny_all" | "require_client_grant";
}

/** User Management → Users. */
export interface User {
  sub: string;
  email: string;
  name: string;
  permissions: string[];
}

/** Applications → Applications, where clients that register themselves appear too. */
export interface Application {
  clientId: string;
  /** The URL of the document that the client was imported from: its client_id in requests. */
  externalClientId?: string;
  clientSecret?: string;
  /** Credentials → Private Key JWT: the client's public keys, here or where `jwksUri` says. */
  jwks?: JSONWebKeySet;
  jwksUri?: string;
  name: string;
  party: "first-party" | TenantKind;
  callbackUrls: string[];
  grantTypes: string[];
  /** Connections tab, by name. It counts for first-party applications; third-party ones get all of domain level. */
  connections?: string[];
  /** Refresh Token Rotation → Rotation Overlap Period, in seconds; left out is 0. */
  rotationOverlap?: number;
  /** Identifiers of the APIs that a machine-to-machine application is authorized for. */
  authorizedApis?: string[];
  /** APIs → User Access, by identifier. */
  userDelegatedApis?: string[];
}

export interface TenantSettings {
  kind: TenantKind;
  dynamicClientRegistration: boolean;
  clientIdMetadataDocumentRegistration: boolean;
  defaultAudience: string;
  resourceParameterCompatibilityProfile: boolean;
  /** Settings → Advanced: `iss` with every answer of /authorize (RFC 9207). */
  includeIssuerInAuthorizationResponses: boolean;
  apis: Api[];
  /** Authentication → Database, Social, Enterprise. */
  connections: { name: string; domainLevel: boolean; strategy?: string }[];
  applications: Application[];
  applicationLimit: number;
  /** Whether `auth0-action.js` is in the post-login flow. */
  postLoginAction: boolean;
  users: User[];
  /** What a token without an API looks like: Auth0 issues either. */
  userinfoToken: "encrypted" | "opaque";
  /** What the Management API shows of Actions; left out, it follows `postLoginAction`. */
  actions?: StoredAction[];
  flow?: StoredBinding[];
}

export const ALICE: User = { sub: "auth0|alice", email: "alice@example.com", name: "Alice", permissions: [] };
export const BOB: User = { sub: "auth0|bob", email: "bob@example.com", name: "Bob", permissions: [] };

/** A newly created tenant, with two users. */
export function newTenant(kind: TenantKind): TenantSettings {
  return {
    kind,
    dynamicClientRegistration: false,
    clientIdMetadataDocumentRegistration: false,
    defaultAudience: "",
    resourceParameterCompatibilityProfile: false,
    includeIssuerInAuthorizationResponses: false,
    apis: [],
    connections: [{ name: "Username-Password-Authentication", domainLevel: false }],
    applications: [],
    applicationLimit: 10,
    postLoginAction: false,
    users: [{ ...ALICE }, { ...BOB }],
    userinfoToken: "encrypted",
  };
}

/** How ChatGPT becomes a client of the tenant. */
export type Way = "cimd" | "register" | "fixed";

/** A way on a kind of tenant: together they decide what has to be set. */
export interface ClientKind {
  tenant: TenantKind;
  way: Way;
}

/** Every combination: README, "Which way is yours". */
export const CLIENT_KINDS: ClientKind[] = [
  { tenant: "strict", way: "register" },
  { tenant: "strict", way: "cimd" },
  { tenant: "permissive", way: "cimd" },
  { tenant: "permissive", way: "register" },
  { tenant: "strict", way: "fixed" },
  { tenant: "permissive", way: "fixed" },
];

/** A client imported from its document is strict on any tenant; one made by hand is first-party on any. */
export const isStrict = ({ tenant, way }: ClientKind) => way === "cimd" || way === "register" && tenant === "strict";

/** The application that is made by hand in Step 5. */
export const FIXED_CLIENT = { client_id: "fixed", client_secret: "fixed-secret" };
/** The id of a connection in ChatGPT: part of its callback where the tenant's responses do not include the issuer. */
export const FIXED_CALLBACK_ID = "fixed";

/** A setting of the guide: which clients need it, and how it is made. */
type GuideSetting = [
  isNeeded: (client: ClientKind) => boolean,
  set: (settings: TenantSettings, mcpServerUrl: string) => void,
];

const PERMISSIONS = ["tasks:read", "tasks:write"];
const always = () => true;
const isFixed = ({ way }: ClientKind) => way === "fixed";
const fixedApplication = (changes: Partial<Application>) => ({ applications }: TenantSettings) => {
  const application = applications.find(({ clientId }) => clientId === FIXED_CLIENT.client_id);
  if (application) Object.assign(application, changes);
};

/**
 * The README's table "Which way is yours", in the order of its steps. The names are those of
 * `npm run demo -- --break`, where that has one.
 *
 * Two steps are not here: the import of ChatGPT's document (`Tenant.importFromUrl`), and "OIDC enabled" in ChatGPT's
 * form, which has to be unticked for strict clients.
 */
const SETTINGS = {
  "api": [always, ({ apis }, identifier) => {
    const offByDefault = { allowOfflineAccess: false, enableRbac: false };
    apis.push({ identifier, accessTokenProfile: "auth0", permissions: PERMISSIONS, ...offByDefault });
  }],
  "offline-access": [always, ({ apis }) => apis.forEach((api) => api.allowOfflineAccess = true)],
  "default-permissions": [
    isStrict,
    ({ apis }) => apis.forEach((api) => api.defaultPermissionsForThirdPartyApplications = PERMISSIONS),
  ],
  "default-audience": [always, (settings, mcpServerUrl) => settings.defaultAudience = mcpServerUrl],
  "registration": [({ way }) => way === "register", (settings) => settings.dynamicClientRegistration = true],
  "cimd": [({ way }) => way === "cimd", (settings) => settings.clientIdMetadataDocumentRegistration = true],
  "include-issuer": [
    ({ way }) => way !== "register",
    (settings) => settings.includeIssuerInAuthorizationResponses = true,
  ],
  "connection": [
    (client) => !isFixed(client),
    ({ connections }) => connections.forEach((connection) => connection.domainLevel = true),
  ],
  "action": [(client) => !isStrict(client), (settings) => settings.postLoginAction = true],
  "application": [isFixed, ({ applications }) => {
    const { client_id: clientId, client_secret: clientSecret } = FIXED_CLIENT;
    const asCreated = { callbackUrls: [], grantTypes: ["authorization_code"] };
    applications.push({ clientId, clientSecret, name: "ChatGPT", party: "first-party", ...asCreated });
  }],
  "callback": [
    isFixed,
    fixedApplication({ callbackUrls: ["https://chatgpt.com/connector_platform_oauth_redirect"] }),
  ],
  "application-connection": [isFixed, fixedApplication({ connections: ["Username-Password-Authentication"] })],
  "refresh-grant": [isFixed, fixedApplication({ grantTypes: ["authorization_code", "refresh_token"] })],
  "rotation": [isFixed, fixedApplication({ rotationOverlap: 30 })],
} satisfies Record<string, GuideSetting>;

export type SettingName = keyof typeof SETTINGS;

/** What has to be set in the tenant for such a client, in the order of the steps. */
export function settingsFor(client: ClientKind): SettingName[] {
  return (Object.keys(SETTINGS) as SettingName[]).filter((name) => SETTINGS[name][0](client));
}

/** What stops the user where a setting is left out, in the words of the screen. */
export const SYMPTOMS: Record<SettingName, (client: ClientKind) => RegExp> = {
  "api": () => /Service not found: http:\/\/localhost/,
  "offline-access": (client) => isStrict(client) ? /OAUTH_SCOPES_MISMATCH.*offline_access/ : /No refresh token/,
  "default-permissions": () => /Oops!.*Client "tpc_\w+" is not authorized to access resource server "http/,
  "default-audience": (client) =>
    isStrict(client)
      ? /Oops!.*The userinfo audience is not allowed for third party clients/
      : /^401 .*invalid_token.*JWE of 5 parts/,
  "registration": () => /Dynamic client registration is disabled/,
  "include-issuer": ({ way }) =>
    // ChatGPT then uses the document, or the callback, of the one connection
    way === "cimd"
      ? /Oops!.*Unknown client: http\S+\/oauth\/[^/]+\/client\.json/
      : /Oops!.*Callback URL mismatch: https:\/\/chatgpt\.com\/connector\/oauth\//,
  "cimd": () => /Dynamic client registration is disabled/, // which ChatGPT then falls back to
  "connection": () => /Oops!.*no connections enabled for the client/,
  "action": () => /OAUTH_SCOPES_MISMATCH.*Not all requested permissions were granted.*given_name/,
  "application": () => /Oops!.*Unknown client: fixed/,
  "callback": () => /Oops!.*Callback URL mismatch: https:\/\/chatgpt\.com\/connector/,
  "application-connection": () => /no connections enabled for the client/,
  "refresh-grant": () => /No refresh token/,
  "rotation": () => /Unknown or invalid refresh token/,
};

/**
 * The tenant after every step of the README's guide, with the machine-to-machine application of Step 6. ChatGPT's
 * document is still to be imported.
 *
 * @param leftOut What was forgotten.
 */
export function configuredTenant(
  tenant: TenantKind,
  mcpServerUrl: string,
  way: Way = "register",
  leftOut?: SettingName,
): TenantSettings {
  const settings = newTenant(tenant);
  for (const name of settingsFor({ tenant, way })) {
    const [, set] = SETTINGS[name];
    if (name !== leftOut) set(settings, mcpServerUrl);
  }
  settings.applications.unshift({
    clientId: "machine",
    clientSecret: "machine-secret",
    name: "MCP Server Test Client",
    party: "first-party",
    callbackUrls: [],
    grantTypes: ["client_credentials"],
    authorizedApis: [mcpServerUrl],
  });
  return settings;
}
